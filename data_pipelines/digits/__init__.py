"""Tri-modal digits: number words and arithmetic, handwritten digits, dual tones. A demo that needs no download."""
