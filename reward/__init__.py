"""Rewards: text in, one number per completion out."""

from reward.numerical import numerical_video_reward

REWARD_FUNCTIONS = [numerical_video_reward]  # a completion's reward is their sum, in training and in evaluation
