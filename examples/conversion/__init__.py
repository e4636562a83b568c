"""How much of a trained backbone a conversion keeps."""
