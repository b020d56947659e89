"""What ids mean: tokenizers, the vocabulary of three modalities, the form of a document, the role of each token."""
