"""Architecture families as graph builders."""
