"""The lab: arms compared in two minutes, on the embedded world's scenes and a policy of 15,000 parameters."""
