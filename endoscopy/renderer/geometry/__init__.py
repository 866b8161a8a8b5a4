"""Where the rays of the camera meet the wall of a rendered colon."""
