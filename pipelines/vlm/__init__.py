"""Vision-language models as policies: any transformers model for images and text, through its shared prefix."""
