"""What a trained model makes: text token by token from a causal model, any modality by masked diffusion."""
