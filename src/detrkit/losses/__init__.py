"""Set prediction: who answers for which object, and how wrong the answer is."""
