"""The user's side of the wall: how models, guidance and drafts are called on rows of many timesteps."""
