"""Supervised fine-tuning data: conversations of users to token ids with a mask of what is to be learned."""
