"""Instance and panoptic segmentation: a mask head over a detector of any variant."""
