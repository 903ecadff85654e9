"""What is done with whole runs: the demo, evaluation, samples; the results go into the run's folder."""
