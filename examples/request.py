"""Send one request to an agent over MQTT and print its response.

python examples/request.py localhost 1883 qmpballoon/edge-7/vm/web1 set-target '{"target": "50%"}'
"""

import asyncio
import json
import sys
import uuid

import aiomqtt


async def request(
    host: str, port: int, topic: str, verb: str, arguments: dict[str, object]
) -> dict[str, object]:
    """Publish one request and return the response with its transaction."""
    transaction = uuid.uuid4().hex
    async with aiomqtt.Client(host, port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.subscribe(f"{topic}/response/{verb}", qos=1)
        payload = json.dumps({"transaction": transaction, **arguments})
        await client.publish(f"{topic}/request/{verb}", payload, qos=1)
        async with asyncio.timeout(float(str(arguments.get("wait_s", 0))) + 10):
            async for message in client.messages:
                response = json.loads(message.payload)
                if response["transaction"] == transaction:
                    return dict(response)
    raise ConnectionError("the broker closed the connection")


if __name__ == "__main__":
    host, port, topic, verb, *rest = sys.argv[1:]
    response = asyncio.run(request(host, int(port), topic, verb, json.loads(rest[0]) if rest else {}))
    print(json.dumps(response, indent=2))
    sys.exit(0 if response["status"] == "ok" else 1)
