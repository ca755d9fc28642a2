"""merge: base model + adapter → merged model, proven equal to what was trained."""
