"""The verbs of the command line that have substance of their own; `optimize.cli` has a thin function for each verb."""
