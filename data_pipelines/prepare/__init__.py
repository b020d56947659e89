"""From raw files to datasets of tokens: of text, of pairs, of the demo."""
