"""Which way of making a sample is the fastest here: measured costs, a model of rounds, and the choice."""
