//! Registration: the user exists here (pending) and its profile is made by the user-service.

use serde_json::{Value, json};

use crate::definition::{Command, Definition, Step, Undo};

/// One step: create the profile. Refused, the user is taken back here, and `user.delete` follows on
/// the same key: a profile that came into being after all is erased behind it.
pub static DEFINITION: Definition = Definition {
    name: "create_user",
    version: 1,
    steps: &[Step {
        name: "create_profile",
        command: Command { topic: "user.create", payload: whole_user },
        done: "user.create.done",
        refused: "user.create.close",
        either: Some("saga-reply"),
        undo: Undo::Command {
            command: Command { topic: "user.delete", payload: only_id },
            done: "user.delete.done",
            refused: "user.delete.close",
        },
    }],
};

/// The saga's data.
pub fn data(user_id: i64, username: &str, email: &str) -> Value {
    json!({ "id": user_id, "username": username, "email": email })
}

fn whole_user(data: &Value) -> Value {
    data.clone()
}

fn only_id(data: &Value) -> Value {
    json!({ "id": data["id"] })
}
