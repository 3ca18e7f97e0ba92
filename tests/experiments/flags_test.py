"""What `experiments/flags.py` makes of a command line."""

from experiments import flags


def test_addresses_on_a_command_line_are_found_however_long_it_is():
    said = "--out=gs://bucket/a --path='s3://b/c d' (https://host/v1) Ags://d no: // gs:/e"
    found = ["gs://bucket/a", "s3://b/c", "https://host/v1", "gs://d"]
    assert flags.find_addresses(said) == found
    long = "a" * 3_000_000  # hours, were it read once for each of its characters
    assert flags.find_addresses(f"{long} {long}://x") == [f"{long}://x"]
