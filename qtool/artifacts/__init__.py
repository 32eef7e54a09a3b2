"""What steps leave behind: identity, manifest, file layout and store."""
