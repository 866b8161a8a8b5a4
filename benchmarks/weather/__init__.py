"""What the weather suite times: forecasts, analyses, convolutions."""
