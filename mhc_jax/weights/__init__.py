"""Weights as safetensors files: folders of models and connections, and Hugging Face's models of the Llama family."""
