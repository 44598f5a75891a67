"""The plain PyTorch meaning of every op (`ops`) and of what training consists of (`training`)."""
