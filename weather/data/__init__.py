"""Gridded data: WeatherBench-2 stores, the ERA5 sample, the coastline."""
