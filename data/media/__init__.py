"""A file -> patches: videos, images, files at addresses, and a cache of decoded frames."""
