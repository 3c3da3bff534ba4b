"""The pipeline: profiles and arms, the stages that DVC runs, many runs at a time."""
