"""Where things stand: documents in rows, blocks in documents."""
