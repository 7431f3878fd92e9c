"""The mathematics of MoxE: cells, blocks, routing, experts and losses."""
