"""What produces interventions: calibrations of concepts, made from labelled text and kept with a profile."""
