"""Side by side with its peers, in one run: `python -m benchmarks SUBCOMMAND`, from the root of the project."""
