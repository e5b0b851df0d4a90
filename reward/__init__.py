"""Rewards: text in, one number per completion out."""
