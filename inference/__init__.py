"""From a request to a reply: prompts, sessions, caches, sampling and the evaluation of what comes out."""
