"""The network: loading it, its layers, adapters, sharding and optimizer."""
