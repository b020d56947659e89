"""Codecs: images and sounds to tokens and back."""

from data_pipelines.codecs.base import AudioCodec, Codec, ImageCodec, load_codec
from data_pipelines.codecs.patch import PatchCodec
from data_pipelines.codecs.spectral import SpectralCodec

__all__ = ["AudioCodec", "Codec", "ImageCodec", "PatchCodec", "SpectralCodec", "load_codec"]
