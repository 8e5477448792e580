"""Parts of the regression gate: what is counted (steps, operators, instructions) and how it is judged."""
