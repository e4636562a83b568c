"""The paper's comparisons at a small scale: `plan` declares the runs, `run` makes them, `report` shows them."""
