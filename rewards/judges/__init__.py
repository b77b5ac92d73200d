"""Vision-language models as judges of pictures, clips and texts."""
