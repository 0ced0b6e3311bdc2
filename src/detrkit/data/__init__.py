"""Files and boxes: reading, checking, splitting, transforming and loading data sets. Knows no model."""
