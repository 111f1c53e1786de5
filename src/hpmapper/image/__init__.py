"""Images in and out: where they come from (`source`, `opening`), what they consist of (`oci`), how they are saved."""
