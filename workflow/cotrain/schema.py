"""The JSON schema of the settings: in, nothing; out, JSON text that editors read."""

import argparse
import json

from cotrain.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `cotrain schema`: none."""


def run(arguments: argparse.Namespace) -> None:
    """Print the schema; `config/schema.json` is this output."""
    print(json.dumps(Settings.model_json_schema(), indent=2))
