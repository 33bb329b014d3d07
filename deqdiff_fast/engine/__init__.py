"""One solve from noise to sample: settings, system, working memory, rounds, and the serial chain."""
