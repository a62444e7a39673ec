"""Output of a given form: JSON schema, regex, choice, grammar, tool calls, as masks over tokens.

- `spec`: what a caller may ask for.
- `compile`: a wish and a tokenizer -> a `Grammar`, by llguidance.
- `matcher`: a `Grammar` in use: one `Matcher` per text, masks and forced tokens.
- `tool_calls`, `parameters`: grammars for the two ways in which Qwen models write tool calls.
"""
