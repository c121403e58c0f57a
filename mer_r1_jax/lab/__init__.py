"""The lab: arms compared in two minutes, on the synthetic world's scenes and a policy of 15,000 parameters."""
