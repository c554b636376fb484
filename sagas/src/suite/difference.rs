//! Two pictures, and where they differ. Pure.

use serde_json::Value;

/// More places would be read by nobody.
const SHOWN: usize = 5;

/// The places where they differ, with what stood there before and after.
pub(super) fn difference(before: &Value, after: &Value) -> String {
    let mut places = vec![];
    collect("", Some(before), Some(after), &mut places);
    let more = if places.len() > SHOWN { ", and more" } else { "" };
    format!("{}{more}", places[..places.len().min(SHOWN)].join(", "))
}

fn collect(place: &str, before: Option<&Value>, after: Option<&Value>, places: &mut Vec<String>) {
    match (before, after) {
        (before, after) if before == after => {}
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let names = old.keys().chain(new.keys().filter(|name| !old.contains_key(*name)));
            names.for_each(|name| collect(&format!("{place}.{name}"), old.get(name), new.get(name), places));
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) => {
            let indexes = 0..old.len().max(new.len());
            indexes.for_each(|at| collect(&format!("{place}[{at}]"), old.get(at), new.get(at), places));
        }
        (before, after) => {
            let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
            places.push(format!("{place} from {} to {}", shown(before), shown(after)));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_differs_is_shown() {
        let before = json!({ "rows": [{ "id": 1 }, { "id": 2, "status": "new" }], "saga": null });
        let after = json!({ "rows": [{ "id": 1 }, { "id": 2, "status": "old" }, 3], "saga": null });
        assert_eq!(difference(&before, &after), r#".rows[1].status from "new" to "old", .rows[2] from nothing to 3"#);
    }
}
