"""Output of a given form: JSON schema, regex, choice, grammar, tool calls, as masks over tokens.

- `spec`: what a caller may ask for, and the `Grammar` that it becomes.
- `number_bounds`: bounds of numbers, written so that llguidance keeps them.
- `compile`: a wish and a tokenizer -> a `Grammar`, by llguidance.
- `matcher`: a `Grammar` in use: one `Matcher` per text, masks and forced tokens.
- `forms`: the grammars of one checkpoint, which begin where its reasoning ends.
- `tool_calls`, `parameters`: grammars for the two ways in which Qwen models write tool calls.
"""
