"""Speed and memory: what is compared stands in `registry`, `run` measures it, `report` and `plots` show it."""
