"""What is minimised: the weighted sum of losses, and the critic."""
