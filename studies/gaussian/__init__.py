"""A Gaussian mixture of experts whose gate has a temperature: how fast its parameters are found."""
