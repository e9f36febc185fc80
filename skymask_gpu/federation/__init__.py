"""A simulated federation: data, models, local training, attacks, aggregation rules and rounds."""
