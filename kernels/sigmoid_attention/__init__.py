"""Sigmoid attention: the definition, a row-blocked form for any device, and the public op."""

from kernels.sigmoid_attention.op import sigmoid_attention
from kernels.sigmoid_attention.reference import sigmoid_attention_reference

__all__ = ["sigmoid_attention", "sigmoid_attention_reference"]
