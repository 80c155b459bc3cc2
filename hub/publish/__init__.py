"""Makes what RobustBench wants of a network: its submission, and our networks in one file of plain torch."""
