"""Data: from a JSON file and a folder of videos to the model's inputs."""
