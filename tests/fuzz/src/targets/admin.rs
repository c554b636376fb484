//! The operators' port: token, path, query with its cursor, order in the body.

use super::Target;
use crate::http::{ADMIN, check_json};

pub const TARGET: Target = Target {
    name: "admin",
    seeds: &[
        b"GET /admin/outbox?status=parked&topic=user.create&key=42&sagaId=0198c0de-0000-7000-8000-000000000001&cursor=77&limit=5\nauthorization: Bearer m-secret\n\n",
        b"GET /admin/outbox?topic=%00%ff&cursor=9223372036854775808&limit=0&limit=1\nauthorization: bearer  m-secret\n\n",
        b"GET /admin/outbox/42\nauthorization: Bearer m-secret\n\n",
        b"GET /admin/outbox/-9999999999999999999\nauthorization: Bearer m-secret\n\n",
        b"POST /admin/outbox/42/replay\nauthorization: Bearer m-secret\ncontent-type: application/json\n\n{\"reason\":\"seen by ops\",\"dryRun\":true,\"force\":false}",
        b"POST /admin/outbox/replay?key=1\nauthorization: Bearer m-secret\ncontent-type: application/json\n\n{\"reason\":\"why\",\"filter\":{\"status\":\"published\",\"topic\":\"user.create\",\"cursor\":7,\"key\":1.5e300}}",
        b"GET /admin/sagas?status=stuck&name=create-user&userId=7&cursor=0198c0de-0000-7000-8000-000000000001\nauthorization: Bearer m-secret\n\n",
        b"GET /admin/sagas/0198c0de-0000-7000-8000-000000000001\nauthorization: Bearer m-secret\n\n",
        b"GET /admin/relay\nauthorization: Bearer m-secret\n\n",
        b"POST /admin/relay/pause\nauthorization: Bearer m-secret\ncontent-type: application/json\n\n{\"reason\":\"\\u202e\\u0000\",\"topic\":\"user.create\"}",
        b"POST /admin/relay/resume\nauthorization: Bearer m-secret\ncontent-type: text/plain\n\n{\"reason\":\"x\",\"reason\":\"y\"}",
        b"GET /admin/audit?cursor=1&limit=200\nauthorization: Bearer m-secret\n\n",
        b"GET /metrics\n\n",
        b"GET /admin/relay\nauthorization: Basic c4nary\nauthorization: Bearer x\n\n",
        b"DELETE /admin/nothing\nauthorization: Bearer\n\n",
    ],
    run: |input| check_json(input, &ADMIN),
};
